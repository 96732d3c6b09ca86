"""Make device folders and releases on a build machine.

`build.bundle` and `release.release` check what they are given before they import torch.
"""
