"""An audit of DP-SGD as it really runs: what one record contributes, what is drawn, and what an attacker learns."""

from .checks import FALSE_ALARM, Check, audit_engine, audit_subject

__all__ = ["FALSE_ALARM", "Check", "audit_engine", "audit_subject"]
