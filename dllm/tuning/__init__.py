"""From a model and data to a chatbot in one go: the entries that say what is wanted, and the jobs that follow.

`start` finds model and data, `look` counts what is in the data, `defaults` chooses how to train, `follow` downloads,
prepares and trains with the functions of the workflow's rules.
"""
