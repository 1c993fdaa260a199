"""verl_vla: vision-language-action policies improved with GRPO in simulators, under veRL.

Importing the package starts nothing and needs neither veRL nor Ray.
"""

__version__ = "0.1.0"
