"""The embedded data set: real CT and MRI with stated licences, for the demo and the tests."""
