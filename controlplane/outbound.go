package controlplane

import "github.com/mantlet/mantlet/xds/server"

// outbound holds the outbound listeners that were made. They follow from the egress verdicts and the node, with its host ports, alone, so that all subjects whose egress
// nobody isolates share one on each node, and a change of ingress policy makes none.
type outbound map[outboundKey]*server.Resource

type outboundKey struct {
	egress string // hash of the verdicts
	node   string // its addresses
	ports  string // its host ports
}

// maxOutbound bounds the listeners that are kept for whoever comes next; sidecars' sets hold their own. Old ones go with all others.
const maxOutbound = 4096

func (o outbound) listener(key outboundKey, render func() (*server.Resource, error)) (*server.Resource, error) {
	if r := o[key]; r != nil {
		return r, nil
	}
	r, err := render()
	if err != nil {
		return nil, err
	}
	if len(o) >= maxOutbound {
		clear(o)
	}
	o[key] = r
	return r, nil
}
