"""Attention mechanisms, one paper per file. Importing the package registers them, in the order of tables and lists."""

# isort: off
from . import sla
from . import clear
from . import llsa
from . import gna
from . import linfusion

__all__ = ["clear", "gna", "linfusion", "llsa", "sla"]
