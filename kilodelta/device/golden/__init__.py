"""Hold inputs and the outputs they must give, and judge a fine-tune by them before it is served."""
