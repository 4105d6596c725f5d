-- Run once, when the volume is empty.
CREATE DATABASE mlflow;
CREATE DATABASE mlflow_users;
CREATE DATABASE prefect;
