from preprocessed_dataset import dataset_json, plans, preprocessed, small  # noqa: F401  (fixtures)
