"""Schedules: what changes between optimizer steps (WHEN)."""

from .base import SCHEDULES, Run, Schedule, active_schedules, follow, start

__all__ = ["SCHEDULES", "Run", "Schedule", "active_schedules", "follow", "start"]
