"""How pretrained optimizers get into the package: cards, commands, and the tables made from them."""
