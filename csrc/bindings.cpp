// pybind11 shell: torch.Tensor -> TensorView through the Python API (no torch headers), GIL released while
// computing.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "dispatch.h"
#include "stream.h"
#include "threads.h"

namespace py = pybind11;

namespace {

// torch.dtype objects are singletons, so identity names them. Handed in once by _native.py.
struct KnownDType {
  PyObject* object;
  inlay::DType dtype;
};
std::vector<KnownDType> known_dtypes;

constexpr inlay::DType kDTypes[] = {inlay::DType::f32, inlay::DType::bf16, inlay::DType::f16,
                                    inlay::DType::i64, inlay::DType::i16,  inlay::DType::u8};

void init_dtypes(const py::dict& names) {
  known_dtypes.clear();
  for (auto item : names)
    for (inlay::DType dtype : kDTypes)
      if (item.second.cast<std::string>() == inlay::dtype_name(dtype))
        known_dtypes.push_back({item.first.inc_ref().ptr(), dtype});
}

inlay::DType to_dtype(py::handle object) {
  for (const KnownDType& known : known_dtypes)
    if (known.object == object.ptr()) return known.dtype;
  return inlay::DType::other;
}

// Attribute names as interned Python strings, made once: four lookups per tensor are all a conversion costs.
struct Names {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* is_cuda = PyUnicode_InternFromString("is_cuda");
  PyObject* get_device = PyUnicode_InternFromString("get_device");
};

const Names& names() {
  static const Names* const interned = new Names;
  return *interned;
}

py::object attribute(py::handle tensor, PyObject* name) {
  PyObject* value = PyObject_GetAttr(tensor.ptr(), name);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

py::object call(py::handle tensor, PyObject* name) {
  PyObject* value = PyObject_CallMethodObjArgs(tensor.ptr(), name, nullptr);
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

int read_sizes(const py::object& tuple, int64_t* sizes) {
  const Py_ssize_t count = PyTuple_Size(tuple.ptr());
  if (count < 0) throw py::error_already_set();
  if (count > inlay::kMaxDims)
    throw std::invalid_argument("inlay: wanted at most 8 dimensions; flatten some");
  for (Py_ssize_t i = 0; i < count; ++i) {
    sizes[i] = PyLong_AsLongLong(PyTuple_GetItem(tuple.ptr(), i));
    if (sizes[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
  }
  return int(count);
}

inlay::TensorView to_view(py::handle tensor) {
  inlay::TensorView view;
  if (tensor.is_none()) return view;
  view.data = PyLong_AsVoidPtr(call(tensor, names().data_ptr).ptr());
  if (!view.data && PyErr_Occurred()) throw py::error_already_set();
  view.ndim = read_sizes(attribute(tensor, names().shape), view.shape);
  read_sizes(call(tensor, names().stride), view.strides);
  view.dtype = to_dtype(attribute(tensor, names().dtype));
  if (attribute(tensor, names().is_cpu).ptr() == Py_True) return view;
  view.device =
      attribute(tensor, names().is_cuda).ptr() == Py_True ? inlay::Device::cuda : inlay::Device::other;
  view.device_index = int(PyLong_AsLong(call(tensor, names().get_device).ptr()));
  return view;
}

// torch._C._cuda_getCurrentRawStream(device) -> cudaStream_t as int. Handed in once by _native.py.
PyObject* current_stream_of = nullptr;

// What runs one after the other: the calls on one stream, or those that one graph captures from it (0: none).
py::tuple current_work(int device) {
  const py::object stream = py::handle(current_stream_of)(device);
  return py::make_tuple(stream, inlay::capture_of(PyLong_AsVoidPtr(stream.ptr())));
}

// On a device, or -1: the emulated one.
py::tuple linear_scratch(int device, int64_t tokens, int64_t rows, int64_t columns) {
  const inlay::OnStream guard(device, nullptr);
  const inlay::SplitScratch wanted = inlay::quantized_linear_scratch(tokens, rows, columns);
  return py::make_tuple(wanted.counters, wanted.sums);
}

void find_cuda(const inlay::TensorView*& found, const inlay::TensorView& tensor) {
  if (!found && tensor.device == inlay::Device::cuda) found = &tensor;
}
void find_cuda(const inlay::TensorView*& found, const inlay::TensorList& list) {
  if (list.size) find_cuda(found, list.items[0]);
}
template <class Number>
void find_cuda(const inlay::TensorView*&, const Number&) {}

// The ops that have a CUDA kernel, where CUDA kernels are built.
std::vector<std::string> cuda_ops() {
  if (inlay::cuda_archs().empty()) return {};
#define INLAY_OP(name, args) #name,
#define INLAY_CPU_OP(name, args)
  return {
#include "ops.h"
  };
#undef INLAY_OP
}

// An op as Python calls it: on the device of its tensors and the stream that is current there, without the
// GIL.
template <class... A>
auto on_current_stream(void (*op)(A...)) {
  return [op](A... arguments) {
    const inlay::TensorView* cuda = nullptr;
    (find_cuda(cuda, arguments), ...);
    const int device = cuda && current_stream_of ? cuda->device_index : -1;
    void* stream = device < 0 ? nullptr : PyLong_AsVoidPtr(py::handle(current_stream_of)(device).ptr());
    const inlay::OnStream guard(device, stream);
    const py::gil_scoped_release release;
    op(arguments...);
  };
}

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<inlay::TensorView> {
  PYBIND11_TYPE_CASTER(inlay::TensorView, const_name("Tensor"));
  bool load(handle source, bool) {
    value = to_view(source);
    return true;
  }
};

template <>
struct type_caster<inlay::TensorList> {
  PYBIND11_TYPE_CASTER(inlay::TensorList, const_name("Sequence[Tensor]"));
  bool load(handle source, bool) {
    for (handle item : reinterpret_borrow<object>(source)) views.push_back(to_view(item));
    value = {views.data(), int64_t(views.size())};
    return true;
  }
  std::vector<inlay::TensorView> views;
};

template <>
struct type_caster<inlay::IntList> {
  PYBIND11_TYPE_CASTER(inlay::IntList, const_name("Sequence[int]"));
  bool load(handle source, bool) {
    numbers = reinterpret_borrow<object>(source).cast<std::vector<int64_t>>();
    value = {numbers.data(), int64_t(numbers.size())};
    return true;
  }
  std::vector<int64_t> numbers;
};

}  // namespace pybind11::detail

PYBIND11_MODULE(_C, m) {
  m.doc() = "inlay's native kernels; call them through inlay.ops, which checks and allocates";

  m.def("dtype_names", [] {
    std::vector<std::string> result;
    for (inlay::DType dtype : kDTypes) result.emplace_back(inlay::dtype_name(dtype));
    return result;
  });
  m.def("init_dtypes", &init_dtypes);
  m.def("init_streams", [](py::object getter) { current_stream_of = getter.release().ptr(); });
  m.def("current_work", &current_work, py::arg("device"),
        "The current stream and the graph it is captured into");
  m.def("quantized_linear_scratch", &linear_scratch, py::arg("device"), py::arg("tokens"), py::arg("rows"),
        py::arg("columns"), "Numbers of counters and sums, both 0 where tiles are not split");
  m.def("set_num_threads", &inlay::set_num_threads);
  m.def("num_threads", &inlay::num_threads);
  m.def("set_isa", &inlay::set_isa, py::arg("isa") = "",
        "Force one instruction set; empty: INLAY_ISA or the best");
  m.def("isa", [] { return std::string(inlay::kernels().isa); });
  m.def("available_isas", &inlay::available_isas);
  m.def("build_info", [] {
    py::dict info;
    info["isas"] = inlay::built_isas();
    info["openmp"] = inlay::built_with_openmp();
    info["cuda"] = !inlay::cuda_archs().empty();
    info["cuda_archs"] = inlay::cuda_archs();
    info["cuda_ops"] = cuda_ops();
    info["compiler"] = INLAY_COMPILER;
    return info;
  });

// Every op of ops.h under its own name.
#define INLAY_OP(name, args) m.def(#name, on_current_stream(&inlay::name));
#include "ops.h"
#undef INLAY_OP
}
