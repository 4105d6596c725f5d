-- PostgreSQL runs this file once, if its volume is empty.
CREATE DATABASE mlflow;
CREATE DATABASE mlflow_users;
CREATE DATABASE prefect;
