module github.com/mantlet/mantlet/test/cluster/binaries/pause

go 1.26.0
