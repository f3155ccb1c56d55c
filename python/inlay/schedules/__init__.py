"""Schedules: what changes between optimizer steps (WHEN)."""

from .base import SCHEDULES, Run, Schedule, active_schedules, follow, may_train, start

__all__ = ["SCHEDULES", "Run", "Schedule", "active_schedules", "follow", "may_train", "start"]
