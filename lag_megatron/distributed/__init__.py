"""Process groups, rendezvous, heartbeat and watchdog."""
