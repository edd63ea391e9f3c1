module keybroker.example/bench/load

go 1.19
