"""Pipeline schedules as data: families, a simulator, lower bounds, and a search under a memory limit."""
