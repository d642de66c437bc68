// Package hammer tries connections without pause while policies change and processes die, and judges each of them.
//
//	Client ─ one per (peer, target) ─► sidecars ─► App, in a pod: notes who reached it
//	   │ Attempt{peer, target, began, ended, answered}       │ nonce
//	   └───────────────► Chronicle.Judge ◄───────────────────┘
//	                        ▲
//	        Begin, Confirm ─┘ of each policy state: who may reach what
//
// An attempt takes time, and so does an edit. What was in force while an attempt lasted is a run of states: from the last one that every
// sidecar had confirmed before it began to the last one that had been handed to the control plane when it ended. Where all of them deny,
// the attempt must not be admitted: no byte to the client, no connection to the app. Where all of them allow, it must be answered. In
// between either is right.
package hammer
