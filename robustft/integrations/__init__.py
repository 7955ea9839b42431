"""robustft's parts for other people's pipelines, one small module each; see their docstrings.

`batches`: picklable callables for `datasets.Dataset.map` and Ray Data's `map_batches`.
`datatrove_step`: a filter for datatrove pipelines. `trainer_callback`: token entropy and noise
score in the logs of transformers' and TRL's trainers.
"""
