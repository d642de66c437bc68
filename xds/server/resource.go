package server

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// Type URLs whose order matters on the wire, or that may be subscribed to by wildcard without saying so.
const (
	typePrefix    = "type.googleapis.com/"
	ListenerType  = typePrefix + "envoy.config.listener.v3.Listener"
	ClusterType   = typePrefix + "envoy.config.cluster.v3.Cluster"
	ExtensionType = typePrefix + "envoy.config.core.v3.TypedExtensionConfig" // ECDS
)

// Resource is one xDS resource, marshalled once and shared by all sidecars that get the same bytes. It must not be changed.
type Resource struct {
	Type    string // type URL
	Name    string
	Version string // content hash: 32 hexadecimal digits; equal bytes have equal versions
	Any     *anypb.Any

	wire *discoveryv3.Resource // what goes into responses, shared like the bytes
}

// NewResource marshals a message deterministically. The name must be the one that the message itself carries, where it
// carries one: Envoy reads that one.
func NewResource(name string, m proto.Message) (*Resource, error) {
	if name == "" || name == wildcard {
		return nil, fmt.Errorf("resource name %q of a %s: give it a name", name, m.ProtoReflect().Descriptor().FullName())
	}
	value, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("marshal %s %q: %w", m.ProtoReflect().Descriptor().FullName(), name, err)
	}
	sum := sha256.Sum256(value)
	r := &Resource{
		Type:    typePrefix + string(m.ProtoReflect().Descriptor().FullName()),
		Name:    name,
		Version: hex.EncodeToString(sum[:16]),
	}
	r.Any = &anypb.Any{TypeUrl: r.Type, Value: value}
	r.wire = &discoveryv3.Resource{Name: r.Name, Version: r.Version, Resource: r.Any}
	return r, nil
}

// size is about what the resource adds to a response, in bytes.
func (r *Resource) size() int {
	return len(r.Name) + len(r.Version) + len(r.Type) + len(r.Any.Value) + 32
}

// Set is all that one client should hold, apart from what it asks for on demand. It is immutable: any number of clients may
// share one. Two Sets made by separate calls are compared resource by resource; the same Set is recognised at once. The zero
// Set is the empty set, and publishing it removes everything.
type Set struct{ content *setContent }

type setContent struct {
	resources []*Resource // sorted by type URL and name
}

// NewSet makes a Set. Two resources of one type and name are an error.
func NewSet(resources ...*Resource) (Set, error) {
	list := make([]*Resource, len(resources))
	for i, r := range resources {
		if r == nil || r.wire == nil {
			return Set{}, errors.New("set of resources: one was not made by NewResource")
		}
		list[i] = r
	}
	slices.SortFunc(list, compareResources)
	for i := 1; i < len(list); i++ {
		if r := list[i]; compareResources(list[i-1], r) == 0 {
			return Set{}, fmt.Errorf("set of resources: %s %q is listed twice", r.Type, r.Name)
		}
	}
	return Set{&setContent{list}}, nil
}

func compareResources(a, b *Resource) int {
	return cmp.Or(strings.Compare(a.Type, b.Type), strings.Compare(a.Name, b.Name))
}

// change is one resource as it is in two Sets; nil: it is not in that one.
type change struct{ before, after *Resource }

// changes ranges over what differs between two Sets.
func (s Set) changes(next Set) iter.Seq[change] {
	return func(yield func(change) bool) {
		old, now := s.list(), next.list()
		for len(old)+len(now) > 0 {
			var c change
			var order int
			switch {
			case len(old) == 0:
				order = 1
			case len(now) == 0:
				order = -1
			default:
				order = compareResources(old[0], now[0])
			}
			if order <= 0 {
				c.before, old = old[0], old[1:]
			}
			if order >= 0 {
				c.after, now = now[0], now[1:]
			}
			if order == 0 && c.before.Version == c.after.Version {
				continue
			}
			if !yield(c) {
				return
			}
		}
	}
}

func (s Set) list() []*Resource {
	if s.content == nil {
		return nil
	}
	return s.content.resources
}
