"""What the scripts share.

command     how a script begins and ends: errors in one sentence, Ctrl-C, one process to a folder
forms       reading files, and what run.json, metrics.jsonl and track.toml may hold
logs        the lines of a log in the speedrun's text format
runs        reading runs and published logs, and making groups of them
jobs        starting runs, several at a time, and continuing them
estimates   statistics: intervals, steps saved, what makes a record
sequential  the verdict of replicate.py, when seeds are added until it is clear
tuning      the rates to try next
zoo/        the comparison of all optimizers: its table, its runs, its page
pictures    colours, lines and names that all pictures share, and mean curves
kernels     where the time of a training step goes, by kernel
gpu_facts   what torch finds on a GPU machine, and whether its kernels work
"""
