// Command bench measures how soon a change is in force and what it costs: N simulated sidecars speak delta ADS, over mTLS and with a
// token as agents do, to a control plane in a process of its own.
//
//	go run ./test/bench -n 1000                          every workload, as a table
//	go run ./test/bench -n 1000 -shape one-namespace -workload policy-update -o json
//	go run ./test/bench -guard test/bench/baseline.json  counts against a baseline
//	go run ./test/bench -docs docs/performance           tables and plots of docs/performance.md
//
// A run hands one change to the control plane and is over when each sidecar that the change concerns has been sent all of it. Whom it concerns,
// and what they must hold then, is computed apart: from the same objects, by an index that has never seen anything else. After each
// run every sidecar, concerned or not, is held against that.
//
// The clock starts when the control plane is handed the change, which is when the informer's event would arrive: about when the API
// server's write returns.
package main
