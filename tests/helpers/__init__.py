"""Code shared by the tests: workspaces, models, trainings and servers."""
