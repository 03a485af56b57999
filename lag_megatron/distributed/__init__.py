"""Process groups, rendezvous, connections between ranks, heartbeat and watchdog."""
