"""What the speed and scale claims rest on: each figure beside the floor measured in the same run."""
