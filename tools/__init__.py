"""What maintains the repository and checks it: on a GPU (gpu/), pages, images, and the older names of commands."""
