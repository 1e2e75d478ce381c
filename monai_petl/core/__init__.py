"""What attaches methods to a network, stores, switches and measures them: no task, no method."""
