"""What the scripts share.

command     how a script begins and ends: errors in one sentence, Ctrl-C, one process to a folder
runs        reading runs and published logs
jobs        starting runs, several at a time, and continuing them
estimates   statistics: intervals, steps saved, what makes a record
pictures    colours, lines and names that all pictures share
kernels     where the time of a training step goes, by kernel
"""
