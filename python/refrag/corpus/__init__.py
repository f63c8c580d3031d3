"""Text and questions to train on, made from Debian's packages of documentation and dictionaries."""
