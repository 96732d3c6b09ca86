"""Collect no garbage while the process that children are forked from loads its libraries.

Importing this module, before all others, is its effect; each child collects again. Modules and
kernels stay, and looking through their objects again and again was a tenth of the start.
"""

import gc

gc.disable()
