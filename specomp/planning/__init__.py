"""What an experiment will take, said before any weight is loaded: `python run.py plan=true ...`."""
