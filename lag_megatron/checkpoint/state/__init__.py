"""What a training state is: parameters, optimizer states, layouts over ranks, sources of values."""
