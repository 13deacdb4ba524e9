"""The self-contained web page that holds a trained model, writes text with it and shows why."""
