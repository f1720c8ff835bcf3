"""Ray: placing replica groups, rank actors, and (in ray_api.py alone) every call to Ray."""
