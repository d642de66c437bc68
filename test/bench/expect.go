package main

import (
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/mantlet/mantlet/controlplane"
	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/verdict/wire"
	"github.com/mantlet/mantlet/xds"
	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/server"
)

// expected is what each sidecar must hold in a world. It is made of the objects alone, by an index and a control plane that never saw a change.
func expected(w *world) (map[string]versions, error) {
	o := w.all()
	e := &expectation{index: policy.NewIndex(indexConfig()), made: map[string]string{}}
	if err := e.index.ApplyAll(o); err != nil {
		return nil, err
	}
	var err error
	if len(w.sidecars) > 0 && len(w.sidecars[0].uses) > 0 { // else nobody asks for anything on demand
		if e.plane, err = controlplane.New(config(), server.Config{Authenticator: nobody{}}); err != nil {
			return nil, err
		}
		if err := e.plane.Load(o); err != nil {
			return nil, err
		}
	}
	out := make(map[string]versions, len(w.sidecars))
	for _, s := range w.sidecars {
		if out[s.key()], err = e.of(s); err != nil {
			return nil, fmt.Errorf("what %s must hold: %w", s.key(), err)
		}
	}
	return out, nil
}

func indexConfig() policy.Config {
	c := config()
	c.Policy.ServiceNetwork = c.ServiceNetwork
	return c.Policy
}

type nobody struct{ server.Authenticator }

type expectation struct {
	index *policy.Index
	plane *controlplane.ControlPlane
	made  map[string]string // versions, by what they were made of
}

func (e *expectation) of(s sidecarPod) (versions, error) {
	p, ok := e.index.Pod(s.key())
	if !ok {
		return nil, fmt.Errorf("there is no such pod")
	}
	v := e.index.Verdicts(p.Subject.Key)
	out := versions{}
	var failed error
	add := func(key string, typeURL, name string, m func() proto.Message) {
		id := key + " " + typeURL + " " + name
		if _, ok := e.made[id]; !ok {
			r, err := server.NewResource(name, m())
			if err != nil {
				failed = err
				return
			}
			e.made[id] = r.Version
		}
		out[resourceKey{typeURL, name}] = e.made[id]
	}
	subject, node := p.Subject.Key, fmt.Sprint(p.NodeIPs)
	network := verdictNetwork(p)
	for _, c := range xds.Clusters() {
		add("", server.ClusterType, c.Name, func() proto.Message { return c })
	}
	add(node, server.ListenerType, names.Inbound, func() proto.Message { return xds.Inbound(p.NodeIPs, config().Resumption) })
	add(subject, server.ListenerType, names.Gate, func() proto.Message { return xds.Gate(v) })
	add(subject+node, server.ListenerType, names.Outbound, func() proto.Message { return xds.Outbound(v, network) })
	add(subject, server.ExtensionType, names.RBAC, func() proto.Message { return xds.RBAC(v) })
	add(subject, names.TypeVerdicts, names.Verdicts, func() proto.Message { return wire.Message(v) })
	add(s.key(), names.TypePackets, names.Packets, func() proto.Message { return wire.PacketsMessage(e.index.Packets(s.key())) })
	add(node, names.TypeNetwork, names.Network, func() proto.Message {
		return wire.NetworkMessage(network)
	})
	for _, name := range s.uses {
		version := ""
		if r, ok := e.plane.Resolve(server.Client(s.key()), name); ok {
			version = r.Version
		}
		out[resourceKey{server.ClusterType, name}] = version
	}
	return out, failed
}

func verdictNetwork(p policy.Pod) *verdict.Network {
	return &verdict.Network{Cluster: append(append(podNetwork[:0:0], podNetwork...), serviceNetwork...), Node: p.NodeIPs}
}

// difference is what a change means to each sidecar that it concerns.
func difference(before, after map[string]versions) map[string]versions {
	out := map[string]versions{}
	for who, now := range after {
		d := versions{}
		for k, v := range now {
			if before[who][k] != v {
				d[k] = v
			}
		}
		for k := range before[who] {
			if _, still := now[k]; !still {
				d[k] = ""
			}
		}
		if len(d) > 0 {
			out[who] = d
		}
	}
	return out
}
