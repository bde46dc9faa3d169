"""Ships pretrained optimizers with the package: cards, commands, and the tables made from them."""
