"""The files of a run, written so that they survive if the process is killed."""
