"""What methods are made of, and what is done with several of them."""
