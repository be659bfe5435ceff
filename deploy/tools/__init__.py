"""Tools of this directory: they fetch pinned programs, build the images and check both. No service imports them."""
