"""The four stages of ``dvc.yaml``, each a program that ``dvc repro`` runs."""
