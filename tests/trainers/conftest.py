from preprocessed_dataset import dataset_json, plans, preprocessed  # noqa: F401  (fixtures)
