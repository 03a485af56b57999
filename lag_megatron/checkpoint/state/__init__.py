"""The training state that all formats share: parameters, optimizer states, layouts over ranks."""
