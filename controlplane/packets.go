package controlplane

import (
	"fmt"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/verdict/wire"
	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/server"
)

// packets are the packet policies that are published, by subject key and by the node's addresses: replicas on a node share one.
type packets map[string]map[string]packetPolicy

type packetPolicy struct {
	value    *verdict.Packets // as the index gave it: the same pointer is the same value
	resource *server.Resource
}

// packetsOf returns the resource with a pod's packet policy. It is the very same as before where its bytes are.
func (cp *ControlPlane) packetsOf(p policy.Pod) (*server.Resource, error) {
	value := cp.index.Packets(p.Name)
	key, node := p.Subject.Key, fmt.Sprint(p.NodeIPs)
	is := cp.packets[key][node]
	if is.value == value {
		return is.resource, nil
	}
	r, err := server.NewResource(names.Packets, wire.PacketsMessage(value))
	if err != nil {
		return nil, err
	}
	if is.resource == nil || is.resource.Version != r.Version {
		is.resource = r
	}
	is.value = value
	if cp.packets[key] == nil {
		cp.packets[key] = map[string]packetPolicy{}
	}
	cp.packets[key][node] = is
	return is.resource, nil
}

// publishPackets publishes to the pods whose packet policy may be another one than before. It reaches those for whom it is.
func (cp *ControlPlane) publishPackets(pods []string) error {
	for _, name := range pods {
		if p, ok := cp.index.Pod(name); ok {
			if err := cp.publishPod(p); err != nil {
				return err
			}
		}
	}
	return nil
}
