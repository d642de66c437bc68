// Package link carries messages between the agent of a pod, which has no privileges, and whoever has them in the pod's network namespace: the
// child that the node's daemon runs there.
//
//	agent (in the pod)                                 mantlet-agent netns (on the node, in the pod's network namespace)
//	  node.sock ◄──────────────── connect ──────────────── child
//	  AgentMessage: verdicts, flips, … ────────────────────► kernel
//	             ◄──────────────── NodeMessage: results, questions, refusals
//
// A message is its length, 4 bytes with the highest first, and its bytes. Neither end believes the other: what is longer than [MaxMessage],
// what is no message, or has a field or a value that is not known, is an error that ends the link.
package link
