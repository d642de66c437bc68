package policy

import (
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// match is the answer of a selector about all pods of an identity.
type match uint8

const (
	none  match = iota // covers no pod of the identity
	some               // mentions a volatile label: each pod has to be asked
	every              // covers every pod of the identity, whenever it may come
)

// selector is a parsed label selector.
type selector struct {
	text         string // canonical, for equality and for people
	requirements labels.Requirements
}

// parseSelector reads an API label selector. An empty one matches everything (metav1.LabelSelector).
func parseSelector(s *metav1.LabelSelector) (*selector, error) {
	sel, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		return nil, err
	}
	reqs, selectable := sel.Requirements()
	if !selectable {
		return nil, fmt.Errorf("selector %v selects nothing", s)
	}
	return &selector{text: sel.String(), requirements: reqs}, nil
}

func (s *selector) matches(l map[string]string) bool {
	for i := range s.requirements {
		if !s.requirements[i].Matches(labels.Set(l)) {
			return false
		}
	}
	return true
}

// covers asks about an identity by its stable labels.
func (s *selector) covers(stable map[string]string, volatile func(string) bool) match {
	m := every
	for i := range s.requirements {
		r := &s.requirements[i]
		if volatile(r.Key()) {
			m = some
			continue
		}
		if !r.Matches(labels.Set(stable)) {
			return none
		}
	}
	return m
}

// peerSelector is a NetworkPolicyPeer with selectors.
type peerSelector struct {
	key        string    // equal for peers that select alike
	text       string    // for people
	namespace  string    // the policy's own, where the peer has no namespaceSelector
	namespaces *selector // nil: namespace
	pods       *selector
}

func newPeerSelector(policyNamespace string, namespaces, pods *metav1.LabelSelector) (*peerSelector, error) {
	p := &peerSelector{namespace: policyNamespace}
	var err error
	if pods == nil {
		pods = &metav1.LabelSelector{}
	}
	if p.pods, err = parseSelector(pods); err != nil {
		return nil, err
	}
	who := "all pods"
	if p.pods.text != "" {
		who = "pods " + p.pods.text
	}
	if namespaces == nil {
		p.key = "ns=" + policyNamespace + ";pods=" + p.pods.text
		p.text = who + " in " + policyNamespace
		return p, nil
	}
	p.namespace = ""
	if p.namespaces, err = parseSelector(namespaces); err != nil {
		return nil, err
	}
	p.key = "namespaces=" + p.namespaces.text + ";pods=" + p.pods.text
	p.text = who + " in namespaces " + p.namespaces.text
	if p.namespaces.text == "" {
		p.text = who + " in all namespaces"
	}
	return p, nil
}

func (p *peerSelector) namespaceMatches(ns *namespace) bool {
	if p.namespaces == nil {
		return ns.name == p.namespace
	}
	return p.namespaces.matches(ns.labels)
}
