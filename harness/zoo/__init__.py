"""The comparison of all optimizers, which scripts/zoo.py runs.

optimizers  which are compared, and around which values each is tuned
table       the losses of the finished runs, and the costs of a step, as they are filed
training    the runs that are missing: tuning, results, time and memory
page        the page of the results, with its picture
"""
