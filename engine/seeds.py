"""How far apart the seeds are with which the parts of one call draw, so that no two parts draw the same.

Sample i of a call draws with its seed + i; what it draws depends on nothing else of the call (but for the maximal
coupling, lm/speculative.py).
"""

WINDOW = 1 << 20  # windows of a long clip
LEVEL = 1 << 32  # the video and the levels of its sound
STAGE = 1 << 40  # key frames and those between them
ACTIONS = 1 << 48  # a clip's tokens and the actions that it is played by, where none are given
LINK = 1 << 49  # tasks of a chain; beyond all seeds that a user may give
