"""The embedded suite: seven table-top tasks on LIBERO's machinery, without LIBERO's assets.

Tasks 0 to 3 rise in difficulty: push, lift, place, stack. Tasks 4 and 5 share one scene and differ
in the object that the instruction names. Task 6 is task 0 with a cube of another colour.
"""
