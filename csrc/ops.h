// THE contract: every op with its math, shapes and dtypes. Included several times, each time with another
// INLAY_OP, so that declarations, dispatch tables and bindings all come from this one list. INLAY_CPU_OP,
// where an includer defines it, stands for the ops that have no CUDA kernel, INLAY_CUDA_OP for those that
// have no CPU kernel.
//
// Conventions
//   float        float32, bfloat16 or float16; all float arguments of one op share it unless said otherwise
//   [M, N]       rows may be any distance apart, elements of a row are adjacent
//   indices      int64 [s], strictly increasing channel numbers
//   outputs      first; they overlap no input unless the comment says so
//   arithmetic   float32, rounded to nearest even once, when stored
//   results      do not depend on the number of threads

#if !defined(INLAY_CPU_OP)
#define INLAY_CPU_OP INLAY_OP
#endif
#if !defined(INLAY_CUDA_OP)
#define INLAY_CUDA_OP INLAY_OP
#endif

// out[m, j] = x[m, indices[j]]                          out float [M, s] (own dtype), x float [M, K]
INLAY_OP(submatrix_gather, (const TensorView& out, const TensorView& x, const TensorView& indices))

// out = round(y + acc)                                  out, y float [M, N] (may be one), acc f32 [M, N]
INLAY_OP(submatrix_add, (const TensorView& out, const TensorView& y, const TensorView& acc))

// dx[m, indices[j]] = round(dx[m, indices[j]] + acc[m, j])         dx float [M, K], acc f32 [M, s]
INLAY_OP(submatrix_scatter_add, (const TensorView& dx, const TensorView& indices, const TensorView& acc))

// weight[r, indices[j]] = round(values[r, j])           weight float [R, K], values f32 [R, s], any strides
INLAY_OP(submatrix_write, (const TensorView& weight, const TensorView& indices, const TensorView& values))

// out[n, j] = Σ_m dy[m, n]·x[m, j] in fp32            out f32, any strides; dy [M, N], x [M, s]; s ≤ N
// CPU (isa amx only): out [N, s], dy and x bf16; add: out += that
// CUDA: out [P, N, s], a sum per share of the tokens; dy and x bf16 or f16; s ≤ 64; nothing is added to
INLAY_OP(submatrix_grad, (const TensorView& out, const TensorView& dy, const TensorView& x, bool add))

// out = round(Σ_i lefts[i]·rights[i] + bias), add: out is one more summand. Isa avx512_bf16 only
// out f32 or bf16 [M, N], any strides; lefts[i] bf16 [M, K_i] and rights[i] bf16 or f32 [K_i, N], K_i ≥ 1, 1
// to 16 of each, unit stride along either dimension; bias [N] of out's dtype, or None. An f32 right takes
// part as hi + lo, two of bf16: 16 bits of its 24. Subnormal numbers count as 0
INLAY_CPU_OP(matmul_sum, (const TensorView& out, const TensorList& lefts, const TensorList& rights,
                          const TensorView& bias, bool add))

// The same of operands in 8 bits: lefts[i] ≈ s[m]·a and rights[i] ≈ t[n]·b with a, b whole in ±127, s[m] the
// largest magnitude of row m over 127, t[n] that of column n, or 1 where it is below 2⁻¹¹⁹; a =
// nearest(x·(1/s)), ties to even, b likewise. Σ a·b is exact, Σ_i s·t·Σ a·b in fp32. Isa avx512_bf16 only
// lefts[i] and rights[i] bf16, lefts[i] with unit stride along the contraction, K_i ≤ 65536
INLAY_CPU_OP(int8_matmul_sum, (const TensorView& out, const TensorList& lefts, const TensorList& rights,
                               const TensorView& bias, bool add))

// Rows sorted by expert: those of expert e are offsets[e] ≤ m < offsets[e + 1], of E. A matrix of expert e is
// number slots[e] of its stack, -1 where it has none
//   out[m] = round(lefts[0][rows[m]]·rights[0][slots[0][e]] + lefts[1][m]·rights[1][slots[1][e]] + bias[e])
// add: out is one more summand. Without a matrix there is no summand; rows of experts without any stay as
// they are. Isa avx512_bf16 only
// out f32 or bf16 [R, N]; lefts[i] bf16 [R, K_i], rights[i] bf16 or f32 [n_i, K_i, N], 1 or 2 of each, unit
// stride along K_i or N; slots[i] i64 [E]; offsets i64 [E + 1], offsets[E] ≤ R; bias [E, N] of out's dtype,
// or None; rows i64 [R] for a lefts[0] of another number of rows, or None. f32 rights take part as hi + lo if
// `fine`, else as bf16
INLAY_CPU_OP(expert_matmul, (const TensorView& out, const TensorList& lefts, const TensorList& rights,
                             const TensorList& slots, const TensorView& rows, const TensorView& offsets,
                             const TensorView& bias, bool fine, bool add))

// out[slots[e]] = Σ_m left[left_rows[m]]ᵀ·right[right_rows[m]] over the rows m of expert e; that of an expert
// without rows is not written. Isa avx512_bf16 only
// out f32 or bf16 [n, P, Q]; left bf16 [., P], right bf16 [., Q]; left_rows, right_rows i64 [R] or None (m)
INLAY_CPU_OP(expert_grad, (const TensorView& out, const TensorView& left, const TensorView& right,
                           const TensorView& left_rows, const TensorView& right_rows,
                           const TensorView& offsets, const TensorView& slots))

// out[t] = round(Σ_k weights[t, k]·y[places[t, k]]), without summands of places < 0
// out float [T, H], y float [R, H] of its dtype; places i64 [T, K]; weights f32 [T, K], or None (1)
INLAY_CPU_OP(expert_combine, (const TensorView& out, const TensorView& y, const TensorView& places,
                              const TensorView& weights))

// out = act(gate)·up                                    float [M, K]; act 0 silu, 1 gelu tanh, 2 gelu erf
INLAY_OP(swiglu_forward, (const TensorView& out, const TensorView& gate, const TensorView& up, int64_t act))

// dgate = dh·up·act'(gate)   dup = dh·act(gate)         float [M, K]
// h_sel[m, j] = act(gate)·up at channel indices[j], with the bits of swiglu_forward; float [M, s]
INLAY_OP(swiglu_backward,
         (const TensorView& dgate, const TensorView& dup, const TensorView& h_sel, const TensorView& dh,
          const TensorView& gate, const TensorView& up, const TensorView& indices, int64_t act))

// rstd = 1/sqrt(mean(x²) + eps)   y = x·rstd·(offset + weight)
// y, x float [M, H]; rstd f32 [M]; weight [H] of any float dtype, or None (scale 1)
INLAY_OP(rms_norm_forward, (const TensorView& y, const TensorView& rstd, const TensorView& x,
                            const TensorView& weight, double eps, double offset))

// t = dy·(offset + weight)   dx = rstd·(t − x·rstd²·mean(t·x))   dweight[j] = Σ_m dy[m, j]·x[m, j]·rstd[m]
// dx, dy, x float [M, H]; dweight [H] of any float dtype; one of the two may be None
// sums f32 [P, H], of any content: scratch for dweight, a row for each of P ≥ 1 shares of the rows; or None
INLAY_OP(rms_norm_backward,
         (const TensorView& dx, const TensorView& dweight, const TensorView& sums, const TensorView& dy,
          const TensorView& x, const TensorView& weight, const TensorView& rstd, double offset))

// y[m, c] = round(gamma·x[m, c] + beta), at every channel c or at the indices; the other channels are copied
// y, x float [M, K]; gamma, beta f32 [K], or [s] with indices, one of them possibly None (1, 0); indices or
// None
INLAY_OP(scale_shift_forward, (const TensorView& y, const TensorView& x, const TensorView& gamma,
                               const TensorView& beta, const TensorView& indices))

// dx = gamma·dy, at the indices or at all   dgamma[j] = Σ_m dy·x   dbeta[j] = Σ_m dy
// dx, dy float [M, K]; x float [M, K] or [M, s], the chosen channels; dgamma, dbeta, gamma f32 [K] or [s]
// dx (with gamma), dgamma (with x) and dbeta may be None, but one of the last two is given
// sums f32 [P, n], n the numbers of dgamma and dbeta together: scratch as above
INLAY_OP(scale_shift_backward,
         (const TensorView& dx, const TensorView& dgamma, const TensorView& dbeta, const TensorView& sums,
          const TensorView& dy, const TensorView& x, const TensorView& gamma, const TensorView& indices))

// y1 = x1·cos1 − x2·sin1   y2 = x2·cos2 + x1·sin2       halves of the first R channels; the others are copied
// inverse: y1 = x1·cos1 + x2·sin2   y2 = x2·cos2 − x1·sin1         (the transposed map)
// y, x float [B, H, T, D]; cos, sin [B or 1, T, R] of any one float dtype; unit stride along D and R
INLAY_OP(rope_rotate, (const TensorView& y, const TensorView& x, const TensorView& cos, const TensorView& sin,
                       bool inverse))

// loss[i] = logsumexp(logits[i]) − logits[i, labels[i]];  write_grad: logits ← (softmax(logits) −
// onehot)·scale loss f32 [c]; logits float [c, V], in place; labels int64 [c] in [0, V)
INLAY_OP(cross_entropy_chunk, (const TensorView& loss, const TensorView& logits, const TensorView& labels,
                               double scale, bool write_grad))

// g = grad·grad_scale;  p ← p·(1 − lr·weight_decay);  m ← m + (1−beta1)·(g−m);  v ← beta2·v + (1−beta2)·g²
// p ← p − lr/(1−beta1^step) · m/(sqrt(v)/sqrt(1−beta2^step) + eps)
// lists of f32 vectors, params[i], exp_avgs[i], exp_avg_sqs[i] in place
INLAY_OP(adamw_step, (const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                      const TensorList& exp_avg_sqs, double lr, double beta1, double beta2, double eps,
                      double weight_decay, int64_t step, double grad_scale))

// The same step with states of 8 bits: state[j] = map[code[j]]·absmax[j / 256], the dynamic maps of
// arXiv:2110.02861. The step is taken with the new fp32 states, which are then coded: absmax = max |state| of
// the block (a NaN is passed over), code = the level nearest to state/absmax; a positive v never becomes 0
//
// exp_avgs[i], exp_avg_sqs[i] u8 as long as params[i], absmaxes f32 [ceil(n/256)], all in place
// maps f32 [256]
INLAY_OP(adamw_8bit_step, (const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                           const TensorList& exp_avg_sqs, const TensorList& exp_avg_absmaxes,
                           const TensorList& exp_avg_sq_absmaxes, const TensorView& signed_map,
                           const TensorView& unsigned_map, double lr, double beta1, double beta2, double eps,
                           double weight_decay, int64_t step, double grad_scale))

// adamw_step on bf16 parameters: each is widened to an fp32 number, its master, which is stepped and rounded.
// Either residuals or positions are given, the other list is empty:
//   residuals: bits(master) = (bits(param) << 16) + residual, so that nothing is lost. param is the nearest
//     bf16, of two the one further from 0: if it were the even one, an even bf16 would stand for 65,537 fp32
//     numbers, one more than a residual can tell apart
//   positions: bits(param) = (bits(master) + r) >> 16, so that the mean over r is the master. Parameter j of
//     tensor i takes r, 16 bits, from place p = positions[i] + j of a sequence that seed and step name:
//     number p % 8 of what Philox4x32-7 gives for the counter (p / 8, step), each 64 bits, and the key seed
// A NaN becomes 0x7fc0, without a residual.
//
// params[i] bf16, in place; grads f32 or bf16, all alike; exp_avgs[i], exp_avg_sqs[i] f32, residuals[i] i16,
// in place; positions ≥ 0
INLAY_OP(adamw_bf16_step, (const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                           const TensorList& exp_avg_sqs, const TensorList& residuals,
                           const IntList& positions, double lr, double beta1, double beta2, double eps,
                           double weight_decay, int64_t step, double grad_scale, int64_t seed))

// The same on states of 8 bits, as in adamw_8bit_step; positions are multiples of 8
INLAY_OP(adamw_8bit_bf16_step,
         (const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
          const TensorList& exp_avg_sqs, const TensorList& exp_avg_absmaxes,
          const TensorList& exp_avg_sq_absmaxes, const TensorList& residuals, const IntList& positions,
          const TensorView& signed_map, const TensorView& unsigned_map, double lr, double beta1, double beta2,
          double eps, double weight_decay, int64_t step, double grad_scale, int64_t seed))

// out = softmax(s)·v over the keys that a query sees   s = q·kᵀ·scale, or softcap·tanh(q·kᵀ·scale/softcap)
// where softcap is not 0   lse = logsumexp of s; with sinks of s and sinks[h], a logit that has no value: it
// takes its share of the softmax and gives nothing
// q, out float [B, H, T, D]; k, v float [B, G, S, D], H a multiple of G; lse f32 [B, H, T]; sinks f32 [H], or
// None; unit stride along D. spans int64 [B or 1, T, 2]: token t sees keys spans[t][0] ≤ j < spans[t][1],
// both in [0, S] and neither falling from token to token; or None, which is causal: keys j ≤ t, and S = T. A
// token that sees none: out 0, lse -inf or its sink. Nothing is computed for blocks of keys that nobody sees.
// Where the CPU multiplies pairs of bf16 (isa avx512_bf16 and amx) P is rounded to bf16 for its product, as
// torch does. No CUDA kernel: torch's flash attention is there already.
INLAY_CPU_OP(attention_forward, (const TensorView& out, const TensorView& lse, const TensorView& q,
                                 const TensorView& k, const TensorView& v, const TensorView& spans,
                                 const TensorView& sinks, double scale, double softcap))

// Its gradients, from out and lse:
//   P = exp(s − lse)   dS = P·(dout·vᵀ − rowsum(dout·out))·scale·(1 − (s/softcap)²), without softcap ·scale
//   dq = dS·k   dk = dSᵀ·q   dv = Pᵀ·dout, dk and dv summed over the heads of a group
// dq, dout as q, dk as k, dv as v. parts f32 [P, B, H, T, D], scratch of any content: the keys are worked on
// in P shares, which are added in order; or None, one share. dS is rounded where P is.
INLAY_CPU_OP(attention_backward,
             (const TensorView& dq, const TensorView& dk, const TensorView& dv, const TensorView& parts,
              const TensorView& dout, const TensorView& q, const TensorView& k, const TensorView& v,
              const TensorView& out, const TensorView& lse, const TensorView& spans, double scale,
              double softcap))

// dsinks[h] = −Σ over batch and tokens of exp(sinks[h] − lse)·rowsum(dout·out)
// dsinks, sinks f32 [H]; dout, out float [B, H, T, D], unit stride along D; lse f32 [B, H, T]
INLAY_CPU_OP(attention_sinks, (const TensorView& dsinks, const TensorView& dout, const TensorView& out,
                               const TensorView& lse, const TensorView& sinks))

// z[b, t, c] = bias[c] + Σ_j weight[c, j]·x[b, t − K + 1 + j, c], tokens before the first being 0
// y = z·sigmoid(z) if `silu`, else z
// y, x float [B, T, C], unit stride along C; weight [C, K] and bias [C], or None (0), of any float dtype.
INLAY_OP(causal_conv1d_forward, (const TensorView& y, const TensorView& x, const TensorView& weight,
                                 const TensorView& bias, bool silu))

// Its gradients: dx, dy as x; dweight as weight, dbias as bias; each of the three possibly None
// sums f32 [B·ceil(T/64), (K + 1)·C], of any content: scratch where dweight or dbias is given, else None
INLAY_OP(causal_conv1d_backward, (const TensorView& dx, const TensorView& dweight, const TensorView& dbias,
                                  const TensorView& sums, const TensorView& dy, const TensorView& x,
                                  const TensorView& weight, const TensorView& bias, bool silu))

// The gated delta rule (arXiv:2412.06464, equation 10, with the state transposed), for each head from an
// initial state on:
//   S_t = e^g_t·S_(t-1) + k_t·(beta_t·(v_t − e^g_t·S_(t-1)ᵀ·k_t))ᵀ        out_t = scale·S_tᵀ·q_t
// with q_t and k_t divided by sqrt(|·|² + eps) first if `normalize`
// q, k float [B, T, G, dk]; v, out float [B, T, H, dv], H a multiple of G; unit stride along dk and dv; g and
// beta f32 [B, T, H]; states f32 [B, H, dk, dv], each possibly None (initially 0). T is worked through in
// chunks of 64. No CUDA kernel: transformers has Triton's where it runs.
INLAY_CPU_OP(gated_delta_rule_forward,
             (const TensorView& out, const TensorView& final_state, const TensorView& q, const TensorView& k,
              const TensorView& v, const TensorView& g, const TensorView& beta,
              const TensorView& initial_state, double scale, bool normalize, double eps))

// Its gradients, from the inputs alone: states are rebuilt, in scratch. dq, dk as q; dv, dout as v; dg, dbeta
// as g; dinitial and dfinal as the states, dinitial possibly None
INLAY_CPU_OP(gated_delta_rule_backward,
             (const TensorView& dq, const TensorView& dk, const TensorView& dv, const TensorView& dg,
              const TensorView& dbeta, const TensorView& dinitial, const TensorView& dout,
              const TensorView& dfinal, const TensorView& q, const TensorView& k, const TensorView& v,
              const TensorView& g, const TensorView& beta, const TensorView& initial_state, double scale,
              bool normalize, double eps))

// absmax[b] = max |w| in block b, NaN if w is not finite there;  code = level nearest to w/absmax[b]
// packed[i] = code[2i] << 4 | code[2i+1]                 packed u8 [ceil(n/2)]; absmax f32
// [ceil(n/blocksize)] w float [n]; bounds f32 [15], between sorted levels; order u8 [16], codes in the order
// of their levels
INLAY_OP(quantize_4bit, (const TensorView& packed, const TensorView& absmax, const TensorView& w,
                         const TensorView& bounds, const TensorView& order, int64_t blocksize))

// out[r, c] = round(levels[code]·absmax) of weight element (row + r)·columns + column + c
// out float [R, C]; packed u8; levels f32 [16]; absmax f32 [blocks], codes, map, offset None;
// or double-quantized, absmax = map[codes[b]]·absmax[b/256] + offset: codes u8 [blocks], map f32 [256],
// offset f32 []
INLAY_OP(dequantize_4bit,
         (const TensorView& out, const TensorView& packed, const TensorView& levels, const TensorView& absmax,
          const TensorView& codes, const TensorView& map, const TensorView& offset, int64_t blocksize,
          int64_t columns, int64_t row, int64_t column))

// The same for weights of one width below each other, in one launch: rows of out are those of packed[0], then
// those of packed[1], ...
// out float [ΣR_i, K], K ≥ 2; packed[i] u8 of [R_i, K]; absmaxes[i] f32, codes (an empty list, or one each),
// map and offsets as above
INLAY_OP(dequantize_4bit_stack, (const TensorView& out, const TensorList& packed, const TensorView& levels,
                                 const TensorList& absmaxes, const TensorList& codes, const TensorView& map,
                                 const TensorList& offsets, int64_t blocksize))

// y = x·Wᵀ + bias, W [N, K] packed as above and never written; fp32 sums, one rounding of y. Weights are
// fp32, except for bf16 x of five rows or more on AMX and for tensor cores: there level·absmax, or the level,
// has 16 bits
// y float [M, N], x float [M, K], bias float [N] or None
// counters int64, zero before and after, and sums f32, of any content: scratch of the sizes that scratch.h
// says, not used by another call at the same time. With None or less, blocks of a GPU share no tile of W
INLAY_OP(quantized_linear,
         (const TensorView& y, const TensorView& x, const TensorView& packed, const TensorView& levels,
          const TensorView& absmax, const TensorView& codes, const TensorView& map, const TensorView& offset,
          const TensorView& bias, const TensorView& counters, const TensorView& sums, int64_t blocksize))

// y = round(y + s·(x·Aᵀ)·Bᵀ), for a few rows           y float [M, N], x float [M, K]; a f32 [r, K], b f32
// [N, r]
INLAY_CPU_OP(lora_add, (const TensorView& y, const TensorView& x, const TensorView& a, const TensorView& b,
                        double scale))

// inner[m, j] = s·Σ_k x[m, k]·a[j, k]                    inner f32 [M, r], x float [M, K], a f32 [r, K]
INLAY_CUDA_OP(lora_project, (const TensorView& inner, const TensorView& x, const TensorView& a, double scale))

// y = round(y + inner·bᵀ)                                y float [M, N], inner f32 [M, r], b f32 [N, r]
INLAY_CUDA_OP(lora_expand, (const TensorView& y, const TensorView& inner, const TensorView& b))

// dyb[p, m, j] = Σ_n dy[m, n]·sb[n, j] over the p-th of P chunks of the columns, and
// db[q, n, j] = Σ_m dy[m, n]·xa[m, j] over the q-th of Q shares of the tokens, both in multiples of 64
// dyb f32 [P, M, r], db f32 [Q, N, r]; dy [M, N], xa [M, r], sb [N, r] bf16 or f16; r ≤ 16; Q at least M/512
INLAY_CUDA_OP(lora_backward, (const TensorView& dyb, const TensorView& db, const TensorView& dy,
                              const TensorView& xa, const TensorView& sb))

// quantized_linear, and inner·bᵀ before the one rounding: with lora_project all of a few rows of LoRA
// inner f32 [M, r] without gaps, b f32 [N, r]
INLAY_CUDA_OP(quantized_lora_linear,
              (const TensorView& y, const TensorView& x, const TensorView& packed, const TensorView& levels,
               const TensorView& absmax, const TensorView& codes, const TensorView& map,
               const TensorView& offset, const TensorView& bias, const TensorView& inner, const TensorView& b,
               const TensorView& counters, const TensorView& sums, int64_t blocksize))

#undef INLAY_CPU_OP
#undef INLAY_CUDA_OP
