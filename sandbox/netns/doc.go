// Package netns makes a small cluster's network out of network namespaces on this machine, inside one throw-away enclosure.
//
// Nothing of it can outlive the command that made it: the kernel ends every process when PID 1 of the enclosure's PID namespace ends,
// and with the last process go the network namespaces, mounts and nftables, whatever the reason: exit, Ctrl-C, SIGKILL.
//
//	outer: mantlet sandbox            Reenter: makes the namespaces, forwards signals, passes the exit code on
//	  └─ init (PID 1)                 mounts /proc and the run directory, reaps orphans; dies with the outer process
//	       └─ inner: mantlet sandbox  Inside() is true; its network namespace is the node
//	            ├─ pod shop/web-0     own network namespace: a probe server and client without privileges (PodSpec, Target)
//	            │    └─ agent, Envoy  whatever Pod.Start runs there
//	            ├─ pod …
//	            └─ outside            own network namespace that answers for every address of a CIDR (ExternalSpec)
//
// # Packets
//
// Pods are routed, not bridged, so that traffic between any two of them passes the node's prerouting hook and Services can be translated
// there as kube-proxy does it:
//
//	pod eth0 10.64.0.7/32 ──veth── p7, route 10.64.0.7/32 │ node: 10.64.0.1 on lo, forwarding
//	    default via 169.254.1.1, fe80::1                  │   prerouting: Service address → one backend, or refused if there is none
//	                                                      │   default route → void0: nothing there, rejected at once
//
// Neighbours are permanent entries on both sides: no ARP or ND traffic, and no share of the machine-wide neighbour table limit.
//
// # Datagrams
//
// Nobody says that a datagram was dropped. So each carries a nonce of its own, the probe servers write down what they receive, and Fence
// returns when nothing is on its way any more: what is not among Pod.Arrivals then was dropped, however busy the machine.
//
//	outcomes, err := from.Probe(ctx, targets)   // Protocol: UDP
//	err = network.Fence(ctx)
//	arrivals, err := to.Arrivals(ctx)
//
// # Use
//
// main calls Dispatch first. The command then does
//
//	if !netns.Inside() {
//		code, err := netns.Reenter(os.Args)
//		…
//	}
//	network, err := netns.New(netns.Config{…})
//	defer network.Close()
//	pods, err := network.AddPods(ctx, specs)
//	outcomes, err := pods[0].Probe(ctx, targets)
//
// Tests of packages that need it have a TestMain that calls netns.TestMain.
package netns
