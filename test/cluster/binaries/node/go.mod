module github.com/mantlet/mantlet/test/cluster/binaries/node

go 1.26.0
