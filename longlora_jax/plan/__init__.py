"""What a run will need and cost, before it is paid for: plan() and the command, costs by formula, chips."""

from longlora_jax.plan.planner import plan, search

__all__ = ["plan", "search"]
