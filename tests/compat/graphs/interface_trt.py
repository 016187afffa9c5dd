from tests.compat.graphs.interface_03 import FastRouter, Frontend, TrtWorker

Frontend.link(FastRouter).link(TrtWorker)
